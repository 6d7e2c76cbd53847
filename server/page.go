package server

import (
	"crypto/sha256"
	"encoding/base64"
	"strings"
)

const (
	defaultPage = 100
	maxPage     = 1000
)

// pageSize is the size of a page: 0 means defaultPage, more than maxPage means maxPage.
func pageSize(wanted int32) int {
	if wanted <= 0 {
		return defaultPage
	}
	return min(int(wanted), maxPage)
}

// pageToken makes an opaque token of where a list goes on. It belongs to one list and one filter. It carries no
// authority: every page is authorised anew, so its check only has to catch mistakes.
func pageToken(list, filter, at string) string {
	if at == "" {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString([]byte(pageCheck(list, filter, at) + at))
}

// readPageToken returns where a list goes on; "" for the first page.
func readPageToken(token, list, filter string) (string, *apiError) {
	if token == "" {
		return "", nil
	}
	b, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(b) <= pageCheckBytes {
		return "", errPageToken
	}
	at := string(b[pageCheckBytes:])
	if pageToken(list, filter, at) != token || strings.IndexByte(at, 0) >= 0 {
		return "", errPageToken
	}
	return at, nil
}

var errPageToken = fieldError("page_token", "not a next_page_token of this list with this filter")

const pageCheckBytes = 8

func pageCheck(list, filter, at string) string {
	sum := sha256.Sum256([]byte(list + "\x00" + filter + "\x00" + at))
	return string(sum[:pageCheckBytes])
}
