-- +goose Up
-- +goose StatementBegin
-- The schema itself is made by migrations.Up, because the table of revisions lives in it.

-- Facts about the whole store, one row.
CREATE TABLE outbox.control (
  one               boolean     PRIMARY KEY DEFAULT true CHECK (one),
  shards            smallint    NOT NULL CHECK (shards BETWEEN 1 AND 64),  -- fixed: it decides where stored events are found
  gen               smallint    NOT NULL DEFAULT 0,      -- the log generation that is written now
  gen_since         timestamptz NOT NULL DEFAULT now(),  -- when it was opened
  system_identifier numeric(20) NOT NULL,                -- pg_control_system() of the cluster whose xids the log carries
  created_at        timestamptz NOT NULL DEFAULT now(),
  tx_known_since    timestamptz NOT NULL DEFAULT now()   -- every transaction prepared from then on is still in tx
);
INSERT INTO outbox.control (shards, system_identifier)
SELECT coalesce(nullif(current_setting('outbox.shards', true), '')::smallint, 16), system_identifier::numeric FROM pg_control_system();

-- Registered services. An id is never given out again: a deleted source keeps its row.
CREATE TABLE outbox.source (
  source_id          int         PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
  name               text        NOT NULL,
  topics             text[]      NOT NULL,               -- exact names, or a prefix and '*'
  record_profile     smallint    NOT NULL,               -- outbox.v1.RecordProfile
  failure_policy     smallint    NOT NULL,               -- outbox.v1.FailurePolicy
  cloudevents_source text        NOT NULL,
  databases          jsonb       NOT NULL,               -- [{"name", "mode", "dsn_ref"}]
  revision           bigint      NOT NULL DEFAULT 1,
  created_at         timestamptz NOT NULL DEFAULT now(),
  updated_at         timestamptz NOT NULL DEFAULT now(),
  deleted_at         timestamptz
);
CREATE UNIQUE INDEX source_name ON outbox.source (name) WHERE deleted_at IS NULL;

-- One narrow row per transaction: idempotency and decision. Widest columns first, so that no byte is lost to alignment.
CREATE TABLE outbox.tx (
  tx_id       uuid        NOT NULL,
  prepared_at timestamptz NOT NULL DEFAULT now(),
  decided_at  timestamptz,                               -- NULL while PREPARED
  shards      bigint      NOT NULL,                      -- bitmap of the shards that hold its events; the client's token
  digest      bigint      NOT NULL,                      -- hash of the events: detects a reused id
  log_xid     xid8        NOT NULL,                      -- finds its events by the log's only index
  source_id   int         NOT NULL,
  state       smallint    NOT NULL,                      -- 0 PREPARED, 1 COMMITTED, 2 ABORTED
  PRIMARY KEY (source_id, tx_id)
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000,
        autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 500000,
        autovacuum_vacuum_cost_delay = 0);

-- The log: append-only segments, one row per (batch, shard, ≤ 8000 bytes). A ring of generations, each truncated whole.
CREATE TABLE outbox.log (
  xid        xid8        NOT NULL DEFAULT pg_current_xact_id(),
  written_at timestamptz NOT NULL DEFAULT now(),
  seq        int         NOT NULL,                       -- order within the batch
  shard      smallint    NOT NULL,
  gen        smallint    NOT NULL,                       -- ring generation = partition
  stale      int[],                                      -- NULL: every record is valid; else ordinals that lost
  body       bytea       NOT NULL                        -- records, see store/segment.go
) PARTITION BY LIST (gen);
CREATE INDEX log_shard_xid_seq ON outbox.log (shard, xid, seq);
DO $$
BEGIN
  FOR g IN 0..7 LOOP
    EXECUTE format('CREATE TABLE outbox.log_%s PARTITION OF outbox.log FOR VALUES IN (%s) WITH (toast_tuple_target = 8160, autovacuum_enabled = off)', g, g);
    EXECUTE format('ALTER TABLE outbox.log_%s ALTER body SET STORAGE MAIN', g);
  END LOOP;
END $$;

-- One row per generation of the ring.
CREATE TABLE outbox.generation (
  gen       smallint PRIMARY KEY,
  closed_at timestamptz,                                 -- NULL: open, or empty
  used      boolean NOT NULL DEFAULT false               -- false: empty, may be opened
);
INSERT INTO outbox.generation (gen, used) SELECT g, g = 0 FROM generate_series(0, 7) g;

-- Live relay instances: they share the shards evenly.
CREATE TABLE outbox.relay (
  instance   text        PRIMARY KEY,
  live_until timestamptz NOT NULL
);

-- Lease and checkpoint, one row per shard, updated in place many times a second.
CREATE TABLE outbox.shard (
  shard       smallint    PRIMARY KEY,
  epoch       bigint      NOT NULL DEFAULT 0,            -- the fencing token: grows by one at each acquisition
  holder      text        NOT NULL DEFAULT '',
  lease_until timestamptz NOT NULL DEFAULT '-infinity',
  xid         xid8        NOT NULL DEFAULT '0',          -- checkpoint position
  seq         int         NOT NULL DEFAULT -1,
  oldest      xid8        NOT NULL DEFAULT '0',          -- smallest xid the holder may still need from the log
  pend        bytea       NOT NULL DEFAULT '',           -- relay's: not done, not parked, at or before the checkpoint
  offsets     bytea       NOT NULL DEFAULT ''            -- relay's: acknowledged Kafka offsets
) WITH (fillfactor = 20);
INSERT INTO outbox.shard (shard) SELECT g FROM outbox.control, generate_series(0, shards - 1) g;

-- Events copied out of the log because they are undecided or blocked, so that nothing waits for them but their aggregate.
CREATE TABLE outbox.parked (
  xid               xid8        NOT NULL,
  agg               bigint      NOT NULL,                -- hash of the aggregate
  seq               int         NOT NULL,
  record            int         NOT NULL,
  shard             smallint    NOT NULL,
  cause             smallint    NOT NULL,                -- store.Cause
  state             smallint    NOT NULL,                -- of its transaction
  source_id         int         NOT NULL,
  tx_id             uuid        NOT NULL,
  since             timestamptz NOT NULL DEFAULT now(),
  aggregate_type    text        NOT NULL,
  aggregate_id      text        NOT NULL,
  topic             text        NOT NULL,
  body              bytea       NOT NULL,
  -- what the resolver needs; NULL for published transactions
  database          text,
  db_xid            xid8,
  system_identifier numeric(20),
  timeline          bigint,
  database_oid      bigint,
  marker_oid        bigint,
  mode              smallint,
  check_at          timestamptz,                         -- when to ask next
  checks            int         NOT NULL DEFAULT 0,      -- how often it was asked
  last_answer       text,
  -- what the holder knows of a blocked head
  attempts          int         NOT NULL DEFAULT 0,
  error             text        NOT NULL DEFAULT '',
  next_try          timestamptz,
  PRIMARY KEY (shard, xid, seq, record)
);
CREATE INDEX parked_aggregate ON outbox.parked (shard, agg, xid, seq, record);
CREATE INDEX parked_tx ON outbox.parked (source_id, tx_id);
CREATE INDEX parked_in_doubt ON outbox.parked (check_at) WHERE state = 0;

-- Events set aside after a permanent failure.
CREATE TABLE outbox.dead_letter (
  xid            xid8        NOT NULL,
  agg            bigint      NOT NULL,
  seq            int         NOT NULL,
  record         int         NOT NULL,
  shard          smallint    NOT NULL,
  queue          boolean     NOT NULL,                   -- park policy: later events follow; false: set aside alone
  source_id      int         NOT NULL,
  tx_id          uuid        NOT NULL,
  since          timestamptz NOT NULL DEFAULT now(),
  aggregate_type text        NOT NULL,
  aggregate_id   text        NOT NULL,
  topic          text        NOT NULL,
  error          text        NOT NULL,
  attempts       int         NOT NULL,
  body           bytea       NOT NULL,
  PRIMARY KEY (shard, xid, seq, record)
);
CREATE INDEX dead_letter_aggregate ON outbox.dead_letter (shard, agg, xid, seq, record);
CREATE INDEX dead_letter_source ON outbox.dead_letter (source_id, since);

-- Operators' requests that the holder of the shard executes under its epoch.
CREATE TABLE outbox.operation (
  operation_id   bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
  shard          smallint    NOT NULL,
  source_id      int         NOT NULL,
  aggregate_type text        NOT NULL,
  aggregate_id   text        NOT NULL,
  action         smallint    NOT NULL,                   -- store.Action
  actor          text        NOT NULL,
  reason         text        NOT NULL,
  requested_at   timestamptz NOT NULL DEFAULT now(),
  done_at        timestamptz,
  outcome        text        NOT NULL DEFAULT '',
  events         bigint      NOT NULL DEFAULT 0
);
CREATE INDEX operation_pending ON outbox.operation (shard, operation_id) WHERE done_at IS NULL;

-- One row for every decision that was not the client's own: what it rests on.
CREATE TABLE outbox.resolution (
  source_id   int         NOT NULL,
  tx_id       uuid        NOT NULL,
  state       smallint    NOT NULL,
  method      text        NOT NULL CHECK (method IN ('check-back', 'direct', 'operator')),
  evidence    jsonb       NOT NULL,
  actor       text        NOT NULL,
  resolved_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (source_id, tx_id)
);

-- Every admin action, for ever.
CREATE TABLE outbox.audit (
  audit_id bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
  at       timestamptz NOT NULL DEFAULT now(),
  actor    text        NOT NULL,
  action   text        NOT NULL,
  subject  text        NOT NULL,
  reason   text        NOT NULL,
  detail   jsonb       NOT NULL DEFAULT '{}'
);

-- What relays know about Kafka topics; servers refuse events larger than the topic allows.
CREATE TABLE outbox.topic (
  name              text        PRIMARY KEY,
  partitions        int         NOT NULL,
  max_message_bytes int         NOT NULL,
  seen_at           timestamptz NOT NULL DEFAULT now()
);
-- +goose StatementEnd

-- +goose Down
DROP TABLE outbox.topic, outbox.audit, outbox.resolution, outbox.operation, outbox.dead_letter, outbox.parked, outbox.shard,
  outbox.relay, outbox.generation, outbox.log, outbox.tx, outbox.source, outbox.control;
