"""The protocol with the platform: sessions, calls, decisions. One engine per process and event loop; see engine.py."""
