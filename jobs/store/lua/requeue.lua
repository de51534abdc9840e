-- ARGV: id, execution ('' for the janitor), status data. Running → queued; not counted as an
-- attempt when the worker itself gives the job back.
local id = ARGV[1]
if not mend(id) then return 0 end
if get(id, 'status') ~= 'running' then return 0 end
if ARGV[2] ~= '' then
  if get(id, 'execution') ~= ARGV[2] then return 0 end
  if number(id, 'attempts') > 0 then redis.call('HINCRBY', key(id), 'attempts', -1) end
end
redis.call('HDEL', key(id), 'execution', 'worker', 'eta_s')
move(id, 'queued')
emit(id, 'status', ARGV[3])
return 1
