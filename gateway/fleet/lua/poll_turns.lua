-- Takes the turns to ask backends what they have loaded, and reads what is known of each.
-- KEYS: for each backend: its turn, its box (see residents.lua). ARGV: ms for which a turn is taken; for each backend: 1 if
-- this process would ask it.
-- Answers for each backend: 1 if this process has the turn, and the box.
local answer = {}
for i = 1, #KEYS, 2 do
    local may_ask = ARGV[(i + 3) / 2] == '1'
    answer[#answer + 1] = may_ask and redis.call('SET', KEYS[i], '', 'NX', 'PX', ARGV[1]) and 1 or 0
    answer[#answer + 1] = redis.call('HGETALL', KEYS[i + 1])
end
return answer
