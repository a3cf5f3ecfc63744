-- name: drained_backends
-- The backends that get no new requests, since when and by whom.
SELECT backend, at, by FROM drained ORDER BY backend;

-- name: drain_backend
-- From now on a backend gets no new requests.
INSERT INTO drained (backend, by) VALUES ($1, $2) ON CONFLICT (backend) DO NOTHING;

-- name: undrain_backend
-- A backend gets requests again.
DELETE FROM drained WHERE backend = $1;
