-- ARGV: id, worker, execution. The worker lives, and has found that the execution is not its own any
-- more: it was only silent. What was counted then is taken back, once, and what was not yet
-- counted never will be. Returns how many crashes were taken back.
begin_to_free()
local id, worker = ARGV[1], ARGV[2]
if not mend(id) then return 0 end
local now = get(id, 'execution')
if get(id, 'last_worker') == worker and (not now or now == ARGV[3]) then
  redis.call('HDEL', key(id), 'last_worker', 'in_batch')
end
local crashes, lone = counted(id, worker)
if crashes == 0 then return 0 end
redis.call('HDEL', key(id), 'blamed:' .. worker)
redis.call('HSET', key(id), 'crashes', math.max(number(id, 'crashes') - crashes, 0),
           'lone_crashes', math.max(number(id, 'lone_crashes') - lone, 0))
return crashes
