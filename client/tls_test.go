package client_test

import "crypto/tls"

func insecureTLS() *tls.Config { return &tls.Config{MinVersion: tls.VersionTLS12} }
