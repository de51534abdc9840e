-- A record goes, with all that belongs to it but the bytes of its outputs.
local function forget(id)
  local status, queue, idem = get(id, 'status'), get(id, 'queue'), get(id, 'idempotency')
  advance(id, active(status) and number(id, 'work') or number(id, 'done'))
  set_bytes(id, 0)
  leave(queue, id, get(id, 'client'), number(id, 'work'), false)
  redis.call('ZREM', P .. 'jobs', id)
  redis.call('ZREM', P .. 'jobs:status:' .. status, id)
  redis.call('ZREM', P .. 'jobs:model:' .. get(id, 'model'), id)
  redis.call('ZREM', P .. 'queue:' .. queue .. ':' .. status, id)
  redis.call('ZREM', P .. 'due', 'expire:' .. id, 'forget:' .. id)
  redis.call('ZREM', P .. 'webhooks', id)
  redis.call('HDEL', P .. 'webhook_attempts', id)
  redis.call('HDEL', P .. 'suspects', id)
  if idem and idem ~= '' then redis.call('DEL', idem) end
  for _, part in ipairs({'', ':index', ':inputs', ':events', ':state'}) do
    redis.call('DEL', key(id) .. part)
  end
end
