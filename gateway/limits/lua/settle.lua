-- Settles a call: frees what it held, counts the tokens and seconds it used and adds its row for the audit. They are counted
-- once, however often a call is settled.
-- KEYS: calls, leases, means, rows, prompts, dropped, once; then for each counter set: tokens, reserve, slots, queue, budget,
-- seconds.
-- ARGV: call id; tokens reserved (-1: as stored with the call); tokens used; row ('' for none); prompt ('' for none);
-- how ('admitted': by Redis, 'local': by a process without Redis, 'abandoned': its process has died); model; completion tokens
-- for the mean of the model (-1: none); most rows; most prompts; channel for freed slots; ms of backends reserved, and used;
-- then for each counter set: whether it limits tokens per minute, has a budget of tokens, has one of seconds (1 or 0).
-- Answers 1 if the tokens were counted now, else 0.
local id, reserved, used, row, prompt, how = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6]
local reserved_ms, used_ms = tonumber(ARGV[12]), tonumber(ARGV[13])

local is_queued = false
if reserved < 0 then
    local info = redis.call('HGET', KEYS[1], id) or ''
    reserved, is_queued = tonumber(string.match(info, '^%d+') or 0), string.sub(info, 1, #QUEUED) == QUEUED
end
local was_known = redis.call('HDEL', KEYS[1], id) == 1
if was_known then redis.call('ZREM', KEYS[2], id) end
local was_running = was_known and not is_queued
local counts = was_running
if not was_running and how == 'local' and (used > 0 or used_ms > 0) then
    counts = redis.call('SET', KEYS[7], 1, 'NX', 'EX', 600) and true or false
end
if not was_known and how == 'abandoned' then return 0 end

for i = 1, (#KEYS - 7) / 6 do
    local k, a = 7 + (i - 1) * 6, 13 + (i - 1) * 3
    local had_slot = redis.call('ZREM', KEYS[k + 3], id) == 1
    if was_running then
        if redis.call('EXISTS', KEYS[k + 3]) == 0 then
            redis.call('DEL', KEYS[k + 2])
        elseif reserved > 0 and redis.call('DECRBY', KEYS[k + 2], reserved) < 0 then
            redis.call('DEL', KEYS[k + 2])
        end
    end
    if (was_running or had_slot) and redis.call('EXISTS', KEYS[k + 4]) == 1 then
        redis.call('PUBLISH', ARGV[11], KEYS[k + 4])
    end
    if counts and used > 0 then
        if ARGV[a + 1] == '1' then add_to(KEYS[k + 1], used) end
        if ARGV[a + 2] == '1' and redis.call('EXISTS', KEYS[k + 5]) == 1 then
            redis.call('HINCRBY', KEYS[k + 5], 'd' .. today, used)
            redis.call('HINCRBY', KEYS[k + 5], 'm' .. month_of(today), used)
            redis.call('EXPIRE', KEYS[k + 5], 6048000)
        end
    end
    if ARGV[a + 3] == '1' and redis.call('EXISTS', KEYS[k + 6]) == 1 then
        if was_running and reserved_ms > 0 and redis.call('HINCRBY', KEYS[k + 6], 'r', -reserved_ms) < 0 then
            redis.call('HDEL', KEYS[k + 6], 'r')
        end
        if counts and used_ms > 0 then
            redis.call('HINCRBY', KEYS[k + 6], 'd' .. today, used_ms)
            redis.call('HINCRBY', KEYS[k + 6], 'm' .. month_of(today), used_ms)
            redis.call('EXPIRE', KEYS[k + 6], 6048000)
        end
    end
end

if counts and tonumber(ARGV[8]) >= 0 then
    local mean = redis.call('HGET', KEYS[3], ARGV[7])
    local fresh = mean and tonumber(mean) * 0.95 + tonumber(ARGV[8]) * 0.05 or tonumber(ARGV[8])
    redis.call('HSET', KEYS[3], ARGV[7], string.format('%.2f', fresh))
end
if row ~= '' then
    if redis.call('XLEN', KEYS[4]) >= tonumber(ARGV[9]) then
        redis.call('INCRBY', KEYS[6], redis.call('XTRIM', KEYS[4], 'MAXLEN', tonumber(ARGV[9]) - 1))
    end
    redis.call('XADD', KEYS[4], '*', 'row', row)
end
if prompt ~= '' then
    redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[10], '*', 'prompt', prompt)
end
return counts and 1 or 0
