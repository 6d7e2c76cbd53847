package process

import (
	"fmt"
	"net"
)

// FreePorts returns different TCP ports of 127.0.0.1 that nobody listens on now. Somebody may take one before it is used.
func FreePorts(count int) ([]int, error) {
	var ports []int
	for range count {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("find a free port: %w", err)
		}
		// All are held until the last is found: so they differ.
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}
