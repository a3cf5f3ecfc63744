-- A call that loaded a model has got its first token: the model is there.
-- ARGV: time; backend; model; bytes.
-- Answers {ms until the scripts should run again}.
local name, model = F .. 'box:' .. ARGV[2], ARGV[3]
local loading, _, began = string.match(redis.call('HGET', name, 'loading') or '', LOADING)
local resident = redis.call('HGET', name, 'r:' .. model)
if loading == model then
    local since = resident and tonumber(string.match(resident, '^%S+ (%S+)')) or now
    redis.call('HSET', name, 'l:' .. model, math.max(1, since - tonumber(began)))
    end_load(name, began)
end
if not resident then redis.call('HSET', name, 'r:' .. model, ARGV[4] .. ' ' .. now .. ' ' .. now .. ' 0 0') end
if is_waiting() then dispatch() end
return {until_wake()}
