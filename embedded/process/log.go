package process

import (
	"os"
	"strings"
)

// LogSize is the present size of a log file, 0 when there is none: where the next process's lines will begin.
func LogSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// LogSince is what was written to a log file after it had a size. An error is its own text: it goes into an error message.
func LogSince(path string, size int64) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(content[min(size, int64(len(content))):])
}

// Tail returns the last lines of a text, for an error message.
func Tail(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}
