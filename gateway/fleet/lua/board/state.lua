-- What waits and what runs, for those who watch.
-- ARGV: time; 1 to estimate when the calls that wait get their first tokens.
-- Answers two lists: of each group in which calls wait {group, calls, tokens of their prompts, ms since the oldest came, ms until
-- the first of them will have its first token, ms until the last (-1: unknown)}, and of each place that has calls {backend,
-- model, calls, ms until one of them will probably end}.
local queues, by_group = {}, {}
for _, group in ipairs(redis.call('SMEMBERS', F .. 'groups')) do
    local size, oldest = redis.call('HMGET', F .. 'size:' .. group, 'n', 't'), now
    for _, name in ipairs(redis.call('HKEYS', F .. 'lines:' .. group)) do
        local first = redis.call('ZRANGE', F .. 'line:' .. group .. ':' .. name, 0, 0, 'WITHSCORES')
        if first[2] then oldest = math.min(oldest, tonumber(first[2])) end
    end
    local queue = {group, tonumber(size[1] or 0), tonumber(size[2] or 0), math.floor(now - oldest), -1, -1}
    queues[#queues + 1], by_group[group] = queue, queue
end

if ARGV[2] == '1' then
    local groups = waiting_groups()
    forget_wants(groups)
    for _, calls in ipairs(groups) do
        local queue, last = by_group[calls[1].group], nil
        for i, call in ipairs(calls) do
            local _, e = evaluate(call)
            last = e.t - e.evict
            if i == 1 then queue[5] = math.floor(math.min(NEVER, last)) end
            wait_on(call, e)
        end
        local call = calls[#calls]
        local more = (queue[2] - #calls) * call.cands[1].service_ms / slots_of(call)
        queue[6] = math.floor(math.min(NEVER, math.max(last, queue[5]) + math.max(0, more)))
    end
end

local places, by_place = {}, {}
for _, pid in ipairs(redis.call('ZRANGE', F .. 'processes', 0, -1)) do
    for _, text in ipairs(redis.call('HVALS', F .. 'calls:' .. pid)) do
        local r = words(text)
        if r[1] == 'r' then
            local name = r[2] .. FS .. r[3]
            if not by_place[name] then
                local ends = redis.call('ZRANGE', F .. 'ends:' .. name, 0, 0, 'WITHSCORES')
                by_place[name] = {r[2], r[3], 0, math.floor(math.max(0, tonumber(ends[2] or now) - now))}
                places[#places + 1] = by_place[name]
            end
            by_place[name][3] = by_place[name][3] + 1
        end
    end
end
return {queues, places}
