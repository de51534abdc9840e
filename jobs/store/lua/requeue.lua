-- ARGV: id, execution ('' for the janitor), status data. Running → queued. A worker that itself
-- gives the job back has not died of it.
local id = ARGV[1]
if not mend(id) then return 0 end
if get(id, 'status') ~= 'running' then return 0 end
if ARGV[2] ~= '' then
  if get(id, 'execution') ~= ARGV[2] then return 0 end
  redis.call('HDEL', key(id), 'last_worker', 'in_batch')
end
give_back(id, ARGV[3])
return 1
