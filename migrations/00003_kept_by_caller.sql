-- +goose Up
-- +goose StatementBegin
-- A Publish that its caller keeps and repeats until it is answered, perhaps days later, is remembered like a decision that was
-- found out: with a row of resolution, for which the row of tx is kept.
ALTER TABLE outbox.resolution
  DROP CONSTRAINT resolution_method_check,
  ADD CONSTRAINT resolution_method_check CHECK (method IN ('check-back', 'direct', 'operator', 'client'));
-- +goose StatementEnd

-- +goose Down
-- +goose StatementBegin
DELETE FROM outbox.resolution WHERE method = 'client';
ALTER TABLE outbox.resolution
  DROP CONSTRAINT resolution_method_check,
  ADD CONSTRAINT resolution_method_check CHECK (method IN ('check-back', 'direct', 'operator'));
-- +goose StatementEnd
