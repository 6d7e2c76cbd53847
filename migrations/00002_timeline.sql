-- +goose Up
-- +goose StatementBegin
-- After a failover the store may have forgotten Commits that it acknowledged, whose markers are gone since. What was prepared
-- before it is told by its xid: xids go on where the new primary's history ends, and no clock is involved.
ALTER TABLE outbox.control
  ADD timeline     text NOT NULL DEFAULT '',             -- the server's, as in WAL file names, when a writer or reader last connected
  ADD timeline_xid xid8 NOT NULL DEFAULT '0';            -- what has a smaller xid may be from an earlier timeline
UPDATE outbox.control SET timeline = substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8);
-- Nobody noted down when earlier failovers were.
UPDATE outbox.control SET timeline_xid = pg_current_xact_id() WHERE timeline <> '00000001';
-- +goose StatementEnd

-- +goose Down
ALTER TABLE outbox.control DROP timeline, DROP timeline_xid;
