package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf16"
	"unicode/utf8"
)

// member is one member of a JSON object, as it was written.
type member struct {
	name  string
	raw   []byte // the name, with its quotes
	value []byte
}

// objectMembers splits a JSON object into its members, in order.
func objectMembers(src []byte) ([]member, error) {
	d := json.NewDecoder(bytes.NewReader(src))
	first, err := d.Token()
	if err != nil {
		return nil, fmt.Errorf("invalid JSON: %w", err)
	}
	if first != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	var all []member
	for d.More() {
		from := d.InputOffset()
		token, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("invalid JSON: %w", err)
		}
		m := member{raw: bytes.TrimLeft(src[from:d.InputOffset()], ", \t\r\n")}
		m.name, _ = token.(string)
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, fmt.Errorf("invalid JSON: %w", err)
		}
		m.value = value
		all = append(all, m)
	}
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("invalid JSON: %w", err)
	}
	if rest := bytes.TrimSpace(src[d.InputOffset():]); len(rest) > 0 {
		return nil, errors.New("invalid JSON: something follows the object")
	}
	return all, nil
}

// appendPythonJSON appends valid JSON as Python's json.dumps writes it: ", " and ": " between things, ASCII only. Strings and
// numbers stay as they were written otherwise, so nothing is lost that a decoder would round or replace.
func appendPythonJSON(to, src []byte) []byte {
	inString := false
	for i := 0; i < len(src); {
		c := src[i]
		switch {
		case inString && c == '\\':
			to = append(to, c, src[i+1])
			i += 2
			continue
		case c == '"':
			inString = !inString
			to = append(to, c)
		case inString && c >= utf8.RuneSelf:
			r, n := utf8.DecodeRune(src[i:])
			to = appendEscaped(to, r)
			i += n
			continue
		case inString:
			to = append(to, c)
		case c == ',' || c == ':':
			to = append(to, c, ' ')
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
		default:
			to = append(to, c)
		}
		i++
	}
	return to
}

func appendEscaped(to []byte, r rune) []byte {
	if r1, r2 := utf16.EncodeRune(r); r1 != utf8.RuneError {
		return fmt.Appendf(to, `\u%04x\u%04x`, r1, r2)
	}
	return fmt.Appendf(to, `\u%04x`, r)
}
