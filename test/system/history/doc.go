// Package history judges a finished run: it compares what a source committed, as the source's own database tells, with
// what stands on Kafka, as a foreign consumer reads it from offset 0. It uses nothing of the platform.
package history
