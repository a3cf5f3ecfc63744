-- name: drained_backends
-- The backends that get no new requests, with the time and the operator of the drain.
SELECT backend, at, by FROM drained ORDER BY backend;

-- name: drain_backend
-- Drains a backend: it gets no new requests.
INSERT INTO drained (backend, by) VALUES ($1, $2) ON CONFLICT (backend) DO NOTHING;

-- name: undrain_backend
-- Ends the drain of a backend: it gets requests again.
DELETE FROM drained WHERE backend = $1;
