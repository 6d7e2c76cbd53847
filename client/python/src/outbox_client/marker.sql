CREATE TABLE outbox_marker (
    id         uuid PRIMARY KEY,                             -- transaction_id
    seq        bigint GENERATED ALWAYS AS IDENTITY,          -- order of spilled requests of one aggregate
    created_at timestamptz NOT NULL DEFAULT now(),
    spilled    bytea,                                        -- serialized PrepareRequest when the platform could not be reached
    refused    text                                          -- why the platform refused a spilled request for good
);
CREATE INDEX outbox_marker_spilled ON outbox_marker (seq) WHERE spilled IS NOT NULL AND refused IS NULL;
