-- Stores which models a backend has loaded, from its answer to a question.
-- KEYS: box, the hash of the backend; turn, which is kept until the backend is to be asked again.
-- ARGV: ms at which the question was sent, by this Redis; ms between questions; 1 if the backend lists models while it loads
-- them; then for each model: name, bytes in VRAM, bytes, tokens of context, ms until it goes (-1: never).
-- Answers the box. The fields of it that are written here:
--   r:<model>   bytes in VRAM, since when it is loaded, when it was last used, until when it stays, tokens of context
--   s:<model>   its bytes
--   seen, room  the most bytes of VRAM in use so far, the least that did not fit
--   gpu         1 once a model was in VRAM; until then all bytes count as bytes in VRAM
--   at          when the last question was sent
--   loads, evictions  how many were seen; a model that is gone although it had more time left than a question counts as evicted
--   polled      the models of the last answer
-- Who causes a load writes "loading", which begins with a model, and when that is done its "r:".
local box, sent, every, lists_loading = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local time = redis.call('TIME')
local at_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local FOREVER, KEPT_MS = 253402300799000, 30 * 86400000

-- The loops of the processes are a little faster.
redis.call('SET', KEYS[2], '', 'PX', math.max(1, math.floor(every * 0.8)))
local fields, flat = {}, redis.call('HGETALL', box)
for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
local before = tonumber(fields.at) or 0
-- A question that was sent later has been answered sooner.
if before > sent then return flat end

local function whole(number) return string.format('%.0f', number) end

local is_table, last = pcall(cjson.decode, fields.polled or '{}')
if not is_table or type(last) ~= 'table' then last = {} end
local known = type(last.models) == 'table' and last.models or {}
local loading = fields.loading and (string.match(fields.loading, '^([^\31]+)\31') or string.match(fields.loading, '^(%S+) '))

local has_gpu, is_first_of_gpu = fields.gpu == '1', false
for i = 4, #ARGV, 5 do
    if not has_gpu and tonumber(ARGV[i + 1]) > 0 then has_gpu, is_first_of_gpu = true, true end
end
-- What was learned of the memory without a GPU says nothing of VRAM.
if is_first_of_gpu then
    redis.call('HSET', box, 'gpu', 1)
    fields.seen, fields.room = nil, nil
end

local listed, models, sum, loads, is_ours, is_loading = {}, {}, 0, 0, false, loading ~= nil
for i = 4, #ARGV, 5 do
    local name, left = ARGV[i], tonumber(ARGV[i + 4])
    listed[name] = true
    if not (lists_loading and name == loading) then
        local since, used = string.match(fields['r:' .. name] or '', '^%d+ (%d+) (%d+)')
        since, used = tonumber(since), tonumber(used)
        local was = type(known[name]) == 'table' and known[name] or nil
        if name == loading then is_loading = false end
        if name == loading or (since and since > before) then is_ours = true end
        if before > 0 and (not was or (since and since > (tonumber(was.since) or 0))) then loads = loads + 1 end
        since, used = since or (was and tonumber(was.since)) or at_ms, used or (was and tonumber(was.used)) or at_ms
        local stays = left < 0 and FOREVER or at_ms + left
        local bytes = has_gpu and ARGV[i + 1] or ARGV[i + 2]
        redis.call('HSET', box, 'r:' .. name,
            table.concat({bytes, whole(since), whole(used), whole(stays), ARGV[i + 3]}, ' '), 's:' .. name, ARGV[i + 2])
        models[name] = {vram = tonumber(bytes), since = since, used = used, stays = stays}
        sum = sum + models[name].vram
    end
end

for field, value in pairs(fields) do
    local kind, name = string.sub(field, 1, 2), string.sub(field, 3)
    local resident = kind == 'r:' and value or (kind == 's:' and (fields['r:' .. name] or ''))
    if resident and not listed[name] and (tonumber(string.match(resident, '^%d+ (%d+)')) or 0) <= sent then
        redis.call('HDEL', box, field)
    end
end

-- The largest of the models that had to go for a load, which may still be in progress.
local evictions, evicted = 0, tonumber(last.evicted) or 0
for name, was in pairs(known) do
    if not listed[name] and type(was) == 'table' and (tonumber(was.stays) or 0) > at_ms + every then
        evictions, evicted = evictions + 1, math.max(evicted, tonumber(was.vram) or 0)
    end
end
local seen, misfit = math.max(tonumber(fields.seen) or 0, sum), tonumber(fields.room)
if is_ours and not is_loading and evicted > 0 then
    local did_not_fit = sum + evicted
    misfit = misfit and math.min(misfit, did_not_fit) or did_not_fit
end
if misfit and misfit > seen then
    redis.call('HSET', box, 'room', whole(misfit))
else
    redis.call('HDEL', box, 'room')
end
if not is_loading then evicted = 0 end

redis.call('HSET', box, 'seen', whole(seen), 'at', ARGV[1], 'polled', cjson.encode({models = models, evicted = evicted}))
if loads > 0 then redis.call('HINCRBY', box, 'loads', loads) end
if evictions > 0 then redis.call('HINCRBY', box, 'evictions', evictions) end
redis.call('HDEL', box, 'error')
redis.call('PEXPIRE', box, KEPT_MS)
return redis.call('HGETALL', box)
