-- The beginning of every script of this folder: the state of the fleet. The rule is in common_estimates.lua, who
-- comes next in common_fairness.lua, the queue in common_queue.lua, which follow.
--
-- KEYS[1] is the prefix of all names, which have one hash tag. ARGV[1] is the time in ms, 0 for the clock of Redis.
--   processes              sorted set: processes by the end of their lease
--   calls:<process>        hash: its calls; "r" backend, model, group, client, user, weight, cost, began, why, tokens
--                          that are probably cached, ms charged of one that runs, "w" group of one that waits
--   ends:<place>           sorted set: the calls that hold a slot of a place (backend and model), by their expected end
--   firsts:<backend>       sorted set: its calls by when they have probably read their prompts
--   fair:<group>           hash: by client, and by client and user, virtual time and how many calls run or wait; "*" and the
--                          client's name with "/*" have the virtual time of all, "~" has the mean cost
--   groups                 set: groups in which calls wait
--   idle:<group>           sorted set: clients and users of whom only their virtual time is kept, by when they had a call last
--   size:<group>           hash: n calls that wait, t tokens of their prompts, since when calls have waited; with ":" and a
--                          client's name n and t of its calls
--   lines:<group>          hash: by client, user and class how many calls are in line
--   line:<group>:<line>    sorted set: calls in line, by arrival
--   queue:<group>          hash: the calls that wait, packed
--   recent:<place>, shared:<place>  sorted sets: conversations and beginnings of prompts, by the time of their last call
--   kept:<place>           hash: the tokens of these conversations
--   box:<backend>          hash: see residents.lua; "loading" is model, call, began, expected end, "evicts" what may go for it,
--                          "settles" when a load began and ended for which it may have gone,
--                          "want" a model for which the backend is cleared, "l:" and a model how long its last load took
-- Times are in milliseconds.
local FS = '\31'
local F = KEYS[1] .. ':'
local NEVER = 1e12
-- The part of the time for which conversations are remembered, within which one is likely to go on.
local GOES_ON = 0.1
-- Of a process that has not renewed it yet.
local FIRST_LEASE = 8000
local now = tonumber(ARGV[1])
if now == 0 then
    local time = redis.call('TIME')
    now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function joined(...) return table.concat({...}, FS) end

local function words(text)
    local found = {}
    for word in string.gmatch(text, '([^' .. FS .. ']*)' .. FS .. '?') do found[#found + 1] = word end
    return found
end

-- When the scripts should run again although nothing happens.
local wake = NEVER
local function wake_at(ms)
    if ms > now and ms < wake then wake = ms end
end

local function until_wake() return wake < NEVER and math.max(1, math.ceil(wake - now)) or 0 end

local function place_of(c) return c.b .. FS .. c.m end

local function running_in(place) return redis.call('ZCARD', F .. 'ends:' .. place) end

-- What a process holds ends with its lease: it has one from its first call on.
local function lease(pid) redis.call('ZADD', F .. 'processes', 'NX', now + FIRST_LEASE, pid) end

local function is_waiting() return redis.call('EXISTS', F .. 'groups') == 1 end

local LOADING = '^(.+) (%S+) (%S+) (%S+)$'

local READ = {}
READ['r:'] = function(box, model, value)
    local size, since, used = string.match(value, '^(%S+) (%S+) (%S+)')
    if size then
        box.residents[model] = {size = tonumber(size), since = tonumber(since), used = tonumber(used)}
        box.sum = box.sum + tonumber(size)
    end
end
READ['l:'] = function(box, model, value) box.load_ms[model] = tonumber(value) end
READ.loading = function(box, _, value)
    local m, id, began, ends = string.match(value, LOADING)
    if m then box.loading = {m = m, id = id, began = tonumber(began), ends = tonumber(ends)} end
end
READ.evicts = function(box, _, value)
    for _, m in ipairs(words(value)) do box.evicts[m] = true end
end
READ.want = function(box, _, value) box.want = value end
READ.seen = function(box, _, value) box.seen = tonumber(value) or 0 end
READ.room = function(box, _, value) box.room = tonumber(value) or 0 end
READ.at = function(box, _, value) box.at = tonumber(value) or 0 end
READ.settles = function(box, _, value)
    local began, ended = string.match(value, '^(%S+) (%S+)$')
    if began then box.settles = {took = ended - began, ended = tonumber(ended)} end
end

-- After a load it is not known what has gone for it, until the backend has been asked; one that does not answer is waited for
-- no longer than the load took.
local function settle(box)
    local settles = box.settles
    if box.at < settles.ended and now <= settles.ended + settles.took then
        wake_at(now + math.max(20, settles.took * 0.1))
    else
        box.settles = nil
    end
end

-- A backend that loads and unloads models, read once.
local boxes = {}
local function box_of(name)
    local box = boxes[name]
    if box then return box end
    box = {residents = {}, load_ms = {}, evicts = {}, blocked = {}, victims = {}, sum = 0, seen = 0, room = 0, at = 0}
    local fields = redis.call('HGETALL', F .. 'box:' .. name)
    for i = 1, #fields, 2 do
        local read = READ[fields[i]] or READ[string.sub(fields[i], 1, 2)]
        if read then read(box, string.sub(fields[i], 3), fields[i + 1]) end
    end
    -- The backend has been asked since.
    if box.loading and box.residents[box.loading.m] then box.loading = nil end
    if box.settles then settle(box) end
    if not box.loading and not box.settles then box.evicts = {} end
    boxes[name] = box
    return box
end

local function has(box, m) return box.residents[m] or (box.loading and box.loading.m == m) end

-- When each slot of a place will be free, in order; 0 for a free one. Of the free ones no more than the calls that are looked at.
local rows, MOST_FREE = {}, 128
local function row_of(c)
    local place = place_of(c)
    local row = rows[place]
    if row then return row end
    row = {}
    local found = redis.call('ZRANGE', F .. 'ends:' .. place, 0, -1, 'WITHSCORES')
    for _ = 1, math.min(MOST_FREE, c.slots - #found / 2) do row[#row + 1] = 0 end
    for i = 2, #found, 2 do
        local ends = tonumber(found[i])
        -- A call that is late will probably take a part of its delay more.
        if ends <= now then ends = now + 20 + (now - ends) * 0.3 end
        row[#row + 1] = ends
    end
    table.sort(row)
    -- More calls than slots: the number of slots was lowered.
    for _ = 1, #row - c.slots do table.remove(row, 1) end
    rows[place] = row
    return row
end

local function occupy(row, ends)
    row[1] = ends
    local i = 1
    while row[i + 1] and row[i] > row[i + 1] do
        row[i], row[i + 1] = row[i + 1], row[i]
        i = i + 1
    end
end

-- When the last call of a place will end.
local function last_of(place)
    local found = redis.call('ZRANGE', F .. 'ends:' .. place, -1, -1, 'WITHSCORES')
    return found[2] and math.max(tonumber(found[2]), now + 20) or 0
end

-- When the calls of a backend that are reading their prompts will probably have done so.
local firsts = {}
local function firsts_of(b)
    local found = firsts[b]
    if found then return found end
    found = {}
    local ids = redis.call('ZRANGEBYSCORE', F .. 'firsts:' .. b, now, '+inf', 'WITHSCORES')
    for i = 2, #ids, 2 do found[#found + 1] = tonumber(ids[i]) end
    firsts[b] = found
    return found
end

-- What a place has cached for a call: tokens of its prompt; whether they are of the conversation itself; and the tokens of the
-- conversation that would lose its cache, if it is likely to go on.
local function cached_of(call, c)
    if call.sticky == 0 then return 0, false, 0 end
    local place, depth = place_of(c), c.swaps and c.slots or c.slots * 4
    local recent = F .. 'recent:' .. place
    for i = 1, #call.prefixes, 2 do
        local rank = redis.call('ZREVRANK', recent, call.prefixes[i])
        if rank then
            local at = tonumber(redis.call('ZSCORE', recent, call.prefixes[i]))
            if rank < depth and now - at <= call.sticky then return call.prefixes[i + 1], true, 0 end
            break
        end
    end
    local forgotten, last = 0, redis.call('ZREVRANGE', recent, depth - 1, depth - 1, 'WITHSCORES')
    if last[1] and now - tonumber(last[2]) < call.sticky * GOES_ON then
        forgotten = tonumber(redis.call('HGET', F .. 'kept:' .. place, last[1]) or 0)
    end
    if call.shared ~= '' then
        local at = redis.call('ZSCORE', F .. 'shared:' .. place, call.shared)
        if at and now - tonumber(at) <= call.sticky then return call.shared_tokens, false, forgotten end
    end
    return 0, false, forgotten
end

local function remember(call, c)
    local place = place_of(c)
    if call.full ~= '' then
        local recent, kept, most = F .. 'recent:' .. place, F .. 'kept:' .. place, c.slots * 4 + 16
        for i = 1, #call.prefixes, 2 do
            if redis.call('ZREM', recent, call.prefixes[i]) == 1 then redis.call('HDEL', kept, call.prefixes[i]) end
        end
        redis.call('ZADD', recent, now, call.full)
        redis.call('HSET', kept, call.full, call.prompt)
        for _, old in ipairs(redis.call('ZRANGE', recent, 0, -most - 1)) do
            redis.call('ZREM', recent, old)
            redis.call('HDEL', kept, old)
        end
        redis.call('PEXPIRE', recent, call.sticky)
        redis.call('PEXPIRE', kept, call.sticky)
    end
    if call.shared ~= '' then
        local shared = F .. 'shared:' .. place
        redis.call('ZADD', shared, now, call.shared)
        redis.call('ZREMRANGEBYRANK', shared, 0, -65)
        redis.call('PEXPIRE', shared, call.sticky)
    end
end
