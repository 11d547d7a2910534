-- Prepended to take, append, cancel and state. KEYS: 1 events, 2 state; both in the job's slot.

-- The last id that the stream generated, whether or not trimmed; 0-0 without a stream.
local function top_of(events)
  if redis.call('EXISTS', events) == 0 then return '0-0' end
  local info = redis.call('XINFO', 'STREAM', events)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
end

local function hash(key)
  local flat, map = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

local function next_epoch(top, state)
  return math.max(tonumber(state.epoch or 0), tonumber(string.match(top, '^%d+'))) + 1
end

local function is_over(state) return state.state == 'end' or state.state == 'error' end

local function push_expiry(ttl)
  redis.call('PEXPIRE', KEYS[1], ttl)
  redis.call('PEXPIRE', KEYS[2], ttl)
end
