-- Takes a process that ends off the board, with all that it has there.
-- ARGV: time; process.
-- Answers {ms until the scripts should run again}.
free_all(ARGV[2])
if is_waiting() then dispatch() end
return {until_wake()}
