-- Describes a call that waits anew; the next script that gives free slots to those who wait uses it.
-- ARGV: as of take.lua.
-- Answers {"wait", how many wait in its group}, what it holds:
-- {"go", backend, model, why, ms of its cost, tokens that are probably cached}, or {"gone"}.
local call = read_call(ARGV)
local text = redis.call('HGET', F .. 'calls:' .. call.pid, call.id)
if not text then return {'gone'} end
local r = words(text)
if r[1] == 'r' then return {'go', r[2], r[3], r[10], tonumber(r[8]), tonumber(r[11])} end
redis.call('HSET', F .. 'queue:' .. call.group, call.id, cmsgpack.pack(call))
return {'wait', tonumber(redis.call('HGET', F .. 'size:' .. call.group, 'n') or 0)}
