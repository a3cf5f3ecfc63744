-- The first place of a call in the queue of its model; NULL if it did not wait there. Gateways of the version before do not write
-- it, and read rows that have it.

-- Nobody waits behind us for whoever reads the audit for long: less than writers wait for an answer, more than it takes until
-- the server ends its own vacuum for us.
DO $$
BEGIN
    FOR attempt IN 1..100 LOOP
        BEGIN
            SET LOCAL lock_timeout = '1500ms';
            LOCK TABLE audit IN ACCESS EXCLUSIVE MODE;
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(1);
        END;
    END LOOP;
    RAISE EXCEPTION 'the audit is being read all the time: migrate again when that has ended';
END
$$;

ALTER TABLE audit ADD COLUMN queue_position integer;

-- One row's hash: the same text of it whatever the session's settings. The batch is part of it. Rows without the columns that
-- were added later keep the hash that they had.
CREATE OR REPLACE FUNCTION audit_hash(a audit) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT sha256(convert_to((jsonb_build_array(
        a.id, extract(epoch FROM a.at), a.batch, a.request_id, a.key_id, a.client, a.agent, a.dialect, a.method, a.route,
        a.model, a.answered_as, a.backend, a.attempts, a.status, a.outcome, a.detail, a.stream, a.prompt_tokens,
        a.completion_tokens, a.tokens_from, a.bytes_in, a.bytes_out, encode(float8send(a.queue_ms), 'hex'),
        encode(float8send(a.ttfb_ms), 'hex'), encode(float8send(a.total_ms), 'hex'))
        || CASE WHEN num_nonnulls(a.cached_tokens, a.billed_tokens) = 0 THEN '[]'
                ELSE jsonb_build_array(a.cached_tokens, a.billed_tokens) END
        || CASE WHEN num_nonnulls(a.translated_to, a.dropped) = 0 THEN '[]'
                ELSE jsonb_build_array(jsonb_build_object('translated_to', a.translated_to, 'dropped', a.dropped)) END
        || CASE WHEN num_nonnulls(a.load_ms, a.prefill_ms, a.decode_ms, a.backend_ms, a.seconds_from, a.loaded, a.chosen_because,
                                  a.estimated_ms) = 0 THEN '[]'
                ELSE jsonb_build_array(jsonb_build_array(
                    encode(float8send(a.load_ms), 'hex'), encode(float8send(a.prefill_ms), 'hex'),
                    encode(float8send(a.decode_ms), 'hex'), encode(float8send(a.backend_ms), 'hex'), a.seconds_from, a.loaded,
                    a.chosen_because, encode(float8send(a.estimated_ms), 'hex'))) END
        || CASE WHEN a.queue_position IS NULL THEN '[]'
                ELSE jsonb_build_array(jsonb_build_object('queue_position', a.queue_position)) END)::text,
        'UTF8'))
$$;

-- Adds finished rows to the audit, those that are not there yet, as the next link of the chain; returns how many were new.
-- `told` is a list of objects with the columns' names, without `batch`; `at` in microseconds since the epoch. The database
-- reads them: the gateway's processor has better things to do. A column that a row does not name is NULL.
CREATE OR REPLACE FUNCTION audit_add(told json) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    month     timestamptz;
    last      audit_anchor;
    taken     integer;
    epoch     CONSTANT timestamptz := 'epoch';
    tick      CONSTANT interval := '1 microsecond';
    longest   CONSTANT integer := 400;
BEGIN
    -- One writer at a time, until its transaction ends.
    PERFORM pg_advisory_xact_lock(7237310974232);
    FOR month IN SELECT DISTINCT date_trunc('month', epoch + r.at * tick, 'UTC') FROM json_to_recordset(told) AS r (at bigint) LOOP
        PERFORM audit_make_partition(month);
    END LOOP;
    -- The end of the chain: the newest batch, or the anchor that purging left.
    SELECT true, l.id, l.digest INTO last
    FROM (SELECT id, digest FROM audit_batches UNION ALL SELECT batch, digest FROM audit_anchor ORDER BY id DESC LIMIT 1) AS l;
    IF NOT FOUND THEN
        last := (true, 0, decode(repeat('00', 32), 'hex'));
    END IF;
    WITH written AS (
        INSERT INTO audit (id, at, batch, request_id, key_id, client, agent, dialect, method, route, model, answered_as, backend,
            attempts, status, outcome, detail, stream, prompt_tokens, completion_tokens, tokens_from, bytes_in, bytes_out, queue_ms,
            ttfb_ms, total_ms, cached_tokens, billed_tokens, translated_to, dropped, load_ms, prefill_ms, decode_ms, backend_ms,
            seconds_from, loaded, chosen_because, estimated_ms, queue_position)
        SELECT DISTINCT ON (r.id) r.id, epoch + r.at * tick, last.batch + 1, left(r.request_id, longest), left(r.key_id, longest),
            left(r.client, longest), left(r.agent, longest), left(r.dialect, longest), left(r.method, longest),
            left(r.route, longest), left(r.model, longest), left(r.answered_as, longest), left(r.backend, longest), r.attempts,
            r.status, left(r.outcome, longest), left(r.detail, longest), r.stream, r.prompt_tokens, r.completion_tokens,
            r.tokens_from, r.bytes_in, r.bytes_out, r.queue_ms, r.ttfb_ms, r.total_ms,
            r.cached_tokens, r.billed_tokens, nullif(left(r.translated_to, longest), ''), nullif(left(r.dropped, longest), ''),
            r.load_ms, r.prefill_ms, r.decode_ms, r.backend_ms, nullif(left(r.seconds_from, longest), ''), r.loaded,
            nullif(left(r.chosen_because, longest), ''), r.estimated_ms, nullif(r.queue_position, 0)
        FROM json_to_recordset(told) AS r (id uuid, at bigint, request_id text, key_id text, client text, agent text, dialect text,
            method text, route text, model text, answered_as text, backend text, attempts jsonb, status integer, outcome text,
            detail text, stream boolean, prompt_tokens bigint, completion_tokens bigint, tokens_from text, bytes_in bigint,
            bytes_out bigint, queue_ms double precision, ttfb_ms double precision, total_ms double precision,
            cached_tokens bigint, billed_tokens bigint, translated_to text, dropped text, load_ms double precision,
            prefill_ms double precision, decode_ms double precision, backend_ms double precision, seconds_from text,
            loaded boolean, chosen_because text, estimated_ms double precision, queue_position integer)
        WHERE NOT EXISTS (SELECT FROM audit a WHERE a.at = epoch + r.at * tick AND a.id = r.id)
        RETURNING *
    ), linked AS (
        INSERT INTO audit_batches (id, day, rows, previous, digest)
        SELECT last.batch + 1, (now() AT TIME ZONE 'UTC')::date, count(*), last.digest,
            sha256(last.digest || string_agg(h, ''::bytea ORDER BY h))
        FROM (SELECT audit_hash(ROW(w.*)::audit) AS h FROM written w) AS hashes
        HAVING count(*) > 0
    )
    SELECT count(*) INTO taken FROM written;
    RETURN taken;
END
$$;
