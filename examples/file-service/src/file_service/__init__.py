"""An example of a HuleEdu service on the outbox platform: uploads of essays, and the events about them."""
