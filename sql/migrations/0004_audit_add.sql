-- Adds finished rows to the audit, those that are not there yet, as the next link of the chain; returns how many were new.
-- `told` is a list of objects with the columns' names, without `batch`; `at` in microseconds since the epoch. The database
-- reads them: the gateway's processor has better things to do.
CREATE FUNCTION audit_add(told json) RETURNS integer LANGUAGE plpgsql AS $$
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
            ttfb_ms, total_ms)
        SELECT DISTINCT ON (r.id) r.id, epoch + r.at * tick, last.batch + 1, left(r.request_id, longest), left(r.key_id, longest),
            left(r.client, longest), left(r.agent, longest), left(r.dialect, longest), left(r.method, longest),
            left(r.route, longest), left(r.model, longest), left(r.answered_as, longest), left(r.backend, longest), r.attempts,
            r.status, left(r.outcome, longest), left(r.detail, longest), r.stream, r.prompt_tokens, r.completion_tokens,
            r.tokens_from, r.bytes_in, r.bytes_out, r.queue_ms, r.ttfb_ms, r.total_ms
        FROM json_to_recordset(told) AS r (id uuid, at bigint, request_id text, key_id text, client text, agent text, dialect text,
            method text, route text, model text, answered_as text, backend text, attempts jsonb, status integer, outcome text,
            detail text, stream boolean, prompt_tokens bigint, completion_tokens bigint, tokens_from text, bytes_in bigint,
            bytes_out bigint, queue_ms double precision, ttfb_ms double precision, total_ms double precision)
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
