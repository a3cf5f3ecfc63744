-- Describes a call that waits anew, and gives free slots to those who wait.
-- ARGV: as of take.lua.
-- Answers {"wait", position, ms until the first token (-1: unknown), ms until the scripts should run again}, what it holds:
-- {"go", backend, model, why, ms of its cost, tokens that are probably cached}, or {"gone"}.
local call = read_call(ARGV)
local text = redis.call('HGET', F .. 'calls:' .. call.pid, call.id)
if not text then return {'gone'} end
local r = words(text)
if r[1] == 'r' then return {'go', r[2], r[3], r[10], tonumber(r[8]), tonumber(r[11])} end
redis.call('HSET', F .. 'queue:' .. call.group, call.id, cmsgpack.pack(call))
local outcome = dispatch()[call.id]
if outcome and outcome.granted then
    return {'go', outcome.e.c.b, outcome.e.c.m, outcome.e.why, math.floor(outcome.e.prefill + outcome.e.c.service_ms), outcome.e.cached}
end
local n = tonumber(redis.call('HGET', F .. 'size:' .. call.group, 'n') or 0)
return {'wait', outcome and outcome.position or n, outcome and math.floor(math.min(NEVER, outcome.ms)) or -1, until_wake()}
