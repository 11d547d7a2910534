-- Prepended to renew and settle. KEYS: 1 queue.

-- Whether the consumer group has received the entry. If the server has lost a delivery, it repeats it: the entry's
-- id is above the group's last one then, or the group is gone and is created again from the queue's beginning.
local function was_delivered(group, entry)
  if redis.call('EXISTS', KEYS[1]) == 0 then return false end
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local of = {}
    for i = 1, #flat, 2 do of[flat[i]] = flat[i + 1] end
    if of.name == group then
      local ms, seq = string.match(entry, '(%d+)-(%d+)')
      local last_ms, last_seq = string.match(of['last-delivered-id'], '(%d+)-(%d+)')
      ms, seq, last_ms, last_seq = tonumber(ms), tonumber(seq), tonumber(last_ms), tonumber(last_seq)
      return ms < last_ms or ms == last_ms and seq <= last_seq
    end
  end
  return false
end
