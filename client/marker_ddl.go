package client

import _ "embed"

// MarkerDDL creates the marker table, in plain SQL for PostgreSQL 13 and newer. Run it in the schema that the service's
// search_path finds first. The service's role needs SELECT, INSERT, UPDATE and DELETE on it; row security must be off.
//
//go:embed marker.sql
var MarkerDDL string

// MarkerDDLGoose is MarkerDDL as a goose migration.
var MarkerDDLGoose = "-- +goose Up\n" + MarkerDDL + "\n-- +goose Down\nDROP TABLE outbox_marker;\n"
