-- Keeps a process on the board, removes those that are gone, and gives free slots to those who wait.
-- ARGV: time; process; ms of its lease.
-- Answers {1 if the process was known, how many calls it has here, ms until the scripts should run again}.
local pid = ARGV[2]
local known = redis.call('ZSCORE', F .. 'processes', pid)
redis.call('ZADD', F .. 'processes', now + tonumber(ARGV[3]), pid)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', F .. 'processes', '-inf', now)) do
    for _, id in ipairs(redis.call('HKEYS', F .. 'calls:' .. gone)) do free(gone, id, -1) end
    redis.call('ZREM', F .. 'processes', gone)
end
if is_waiting() then dispatch() end
return {known and 1 or 0, redis.call('HLEN', F .. 'calls:' .. pid), until_wake()}
