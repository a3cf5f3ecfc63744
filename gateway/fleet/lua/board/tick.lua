-- Keeps a process on the board, removes those that are gone, and gives free slots to those who wait.
-- ARGV: time; process; ms of its lease.
-- Answers {1 if the process was known, how many calls it has here, ms until the scripts should run again}.
local pid, ends = ARGV[2], now + tonumber(ARGV[3])
local known = redis.call('ZSCORE', F .. 'processes', pid)
-- Nobody else has removed it though its lease has ended: Redis was away, for all of them.
local was_away = known and tonumber(known) <= now
redis.call('ZADD', F .. 'processes', ends, pid)
for _, late in ipairs(redis.call('ZRANGEBYSCORE', F .. 'processes', '-inf', now)) do
    if was_away then redis.call('ZADD', F .. 'processes', ends, late) else free_all(late) end
end
if is_waiting() then dispatch() end
return {known and 1 or 0, redis.call('HLEN', F .. 'calls:' .. pid), until_wake()}
