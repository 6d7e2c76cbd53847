package pgxoutbox_test

import (
	"io/fs"
	"os"
	"syscall"
	"testing"
)

// chown gives a file to the owner of another one.
func chown(t *testing.T, path string, like fs.FileInfo) {
	t.Helper()
	s, ok := like.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatal("no owner in the file's information")
	}
	if err := os.Chown(path, int(s.Uid), int(s.Gid)); err != nil {
		t.Fatal(err)
	}
}
