-- Frees the slot of a call, or its place in the queue, and gives what came free to those who wait.
-- ARGV: time; process; call; what it has cost in ms (-1: as expected).
-- Answers {1 if the call was known, ms until the scripts should run again}.
local known = free(ARGV[2], ARGV[3], tonumber(ARGV[4]))
if is_waiting() then dispatch(known) end
return {known and 1 or 0, until_wake()}
