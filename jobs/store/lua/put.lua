-- ARGV: id, execution, seconds, then names and bytes of outputs. Returns 1, or 0 where this is not
-- the execution's job.
local id, outputs = ARGV[1], key(ARGV[1]) .. ':outputs'
if not held(id, ARGV[2]) then return 0 end
if redis.call('TYPE', outputs).ok ~= 'hash' then redis.call('DEL', outputs) end
for n = 4, #ARGV, 2 do redis.call('HSET', outputs, ARGV[n], ARGV[n + 1]) end
redis.call('EXPIRE', outputs, ARGV[3])
return 1
