-- ARGV: id, execution, worker, now, digest, status data, canceled data, final data, provenance,
-- how it is in the batch (a suspect is not, until it is alone), status data of a job that waits,
-- lone crashes after which a job is given up, seconds after which a silent worker counts as dead.
-- Returns {what, crashes, crashes while alone, most image-steps ever done}; what: run, canceled,
-- ended, missing, or silent: workers it may have killed may yet come back, and until then it waits.
local id, execution, now = ARGV[1], ARGV[2], tonumber(ARGV[4])
local status = get(id, 'status')
if not status then return {'missing', 0, 0, 0} end
if not active(status) then return {'ended', 0, 0, 0} end
if get(id, 'cancel') == '1' then
  finish(id, 'canceled', now, ARGV[7], 'done', ARGV[8])
  return {'canceled', 0, 0, 0}
end
if get(id, 'execution') ~= execution then blame(id, ARGV[3], ARGV[4]) end
local lone, most = number(id, 'lone_crashes'), tonumber(ARGV[12])
if lone >= most and lone - unsettled(id, now, tonumber(ARGV[13])) < most then
  if status == 'running' then give_back(id, ARGV[11]) end
  return {'silent', 0, 0, 0}
end
local in_batch = ARGV[10]
if in_batch == 'shared' and number(id, 'crashes') > 0 then in_batch = '' end
redis.call('HSET', key(id), 'execution', execution, 'worker', ARGV[3], 'last_worker', ARGV[3],
           'in_batch', in_batch, 'run_digest', ARGV[5], 'provenance', ARGV[9])
redis.call('HSET', P .. 'begun', ARGV[3], id)
if redis.call('HSETNX', key(id), 'started_at', ARGV[4]) == 1 then
  observe('wait', id, number(id, 'created_at'), now)
end
if status ~= 'running' then
  move(id, 'running')
  emit(id, 'status', ARGV[6])
end
return {'run', number(id, 'crashes'), number(id, 'lone_crashes'), number(id, 'best')}
