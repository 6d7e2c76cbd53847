package store

import "encoding/binary"

// array builds a one-dimensional array in PostgreSQL's binary format, in a buffer that is used again and again: the
// parameters of the hot statements are arrays, and encoding them through the driver costs an allocation per element.
type array struct {
	b []byte
	n int
}

// Object ids of the element types.
const (
	oidInt2  = 21
	oidInt4  = 23
	oidInt8  = 20
	oidUUID  = 2950
	oidBytea = 17
	oidText  = 25
	oidJSONB = 3802
	oidXID8  = 5069
)

// arrayHeader: dimensions, flags, element type, then length and lower bound of the only dimension. An array without
// elements has no dimension.
const (
	arrayHeader      = 20
	emptyArrayHeader = 12
)

func (a *array) reset(element uint32) {
	if a.b == nil {
		a.b = make([]byte, 0, 256)
	}
	a.n = 0
	a.b = append(a.b[:0], make([]byte, arrayHeader)...)
	binary.BigEndian.PutUint32(a.b[8:], element)
	binary.BigEndian.PutUint32(a.b[16:], 1)
}

// value is the array as a parameter.
func (a *array) value() []byte {
	if a.n == 0 {
		binary.BigEndian.PutUint32(a.b[0:], 0)
		return a.b[:emptyArrayHeader]
	}
	binary.BigEndian.PutUint32(a.b[0:], 1)
	binary.BigEndian.PutUint32(a.b[12:], uint32(a.n)) //nolint:gosec // far from 2³¹
	return a.b
}

func (a *array) int2(v int16) {
	a.n++
	a.b = binary.BigEndian.AppendUint32(a.b, 2)
	a.b = binary.BigEndian.AppendUint16(a.b, uint16(v)) //nolint:gosec // bytes of an int16
}

func (a *array) int4(v int32) {
	a.n++
	a.b = binary.BigEndian.AppendUint32(a.b, 4)
	a.b = binary.BigEndian.AppendUint32(a.b, uint32(v)) //nolint:gosec // bytes of an int32
}

// int8 serves bigint and xid8.
func (a *array) int8(v uint64) {
	a.n++
	a.b = binary.BigEndian.AppendUint32(a.b, 8)
	a.b = binary.BigEndian.AppendUint64(a.b, v)
}

func (a *array) uuid(v [16]byte) {
	a.n++
	a.b = binary.BigEndian.AppendUint32(a.b, 16)
	a.b = append(a.b, v[:]...)
}

func (a *array) text(v string) {
	a.n++
	a.b = binary.BigEndian.AppendUint32(a.b, uint32(len(v))) //nolint:gosec // far from 2³¹
	a.b = append(a.b, v...)
}

// jsonb takes JSON text; empty stands for {}.
func (a *array) jsonb(v []byte) {
	if len(v) == 0 {
		v = []byte("{}")
	}
	a.n++
	a.b = binary.BigEndian.AppendUint32(a.b, uint32(len(v))+1) //nolint:gosec // far from 2³¹
	a.b = append(a.b, 1)
	a.b = append(a.b, v...)
}

// open begins an element of unknown length; close ends it. The caller appends to a.b in between.
func (a *array) open() (at int) {
	a.n++
	at = len(a.b)
	a.b = append(a.b, 0, 0, 0, 0)
	return at
}

func (a *array) close(at int) {
	binary.BigEndian.PutUint32(a.b[at:], uint32(len(a.b)-at-4)) //nolint:gosec // far from 2³¹
}

// int4s decodes an int[] without NULLs; nil for NULL.
func int4s(b []byte) []int32 {
	if len(b) < arrayHeader {
		return nil
	}
	n := int(binary.BigEndian.Uint32(b[12:]))
	out := make([]int32, 0, min(n, len(b)/8))
	for at := arrayHeader; len(out) < n && at+8 <= len(b); at += 8 {
		out = append(out, int32(binary.BigEndian.Uint32(b[at+4:]))) //nolint:gosec // bytes of an int32
	}
	return out
}

// int2s appends the elements of a smallint[] without NULLs.
func int2s(out []int16, b []byte) []int16 {
	if len(b) < arrayHeader {
		return out
	}
	n := int(binary.BigEndian.Uint32(b[12:]))
	for at := arrayHeader; n > 0 && at+6 <= len(b); n, at = n-1, at+6 {
		out = append(out, int16(binary.BigEndian.Uint16(b[at+4:]))) //nolint:gosec // bytes of an int16
	}
	return out
}
