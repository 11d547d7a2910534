-- Return the numbers of waiting and running jobs of a queue, and the ms since the oldest waiting one was submitted (0
-- if none waits). A job that was not renewed for a lease waits.
-- KEYS: 1 queue. ARGV: 1 group, 2 lease in ms.
require_rights({
  { 'EXISTS', KEYS[1] }, { 'XINFO', 'GROUPS', KEYS[1] }, { 'XPENDING', KEYS[1], ARGV[1] }, { 'XRANGE', KEYS[1], '-', '+' },
  { 'TIME' }, { 'XLEN', KEYS[1] },
})
local undelivered, pending, waiting = '-', 0, {}
for _, reply in ipairs(redis.call('EXISTS', KEYS[1]) == 1 and redis.call('XINFO', 'GROUPS', KEYS[1]) or {}) do
  local group = {}
  for i = 1, #reply, 2 do group[reply[i]] = reply[i + 1] end
  if group['name'] == ARGV[1] then
    undelivered, pending = '(' .. group['last-delivered-id'], group['pending']
    waiting = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[2], '-', '+', 10000)
  end
end
local running = pending - #waiting
local oldest
for _, entry in ipairs(waiting) do -- a deleted entry stays pending until a worker claims it
  oldest = oldest or redis.call('XRANGE', KEYS[1], entry[1], entry[1])[1]
end
oldest = oldest or redis.call('XRANGE', KEYS[1], undelivered, '+', 'COUNT', 1)[1]
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local oldest_ms = oldest and tonumber(string.match(oldest[1], '^%d+')) or now_ms
return {math.max(redis.call('XLEN', KEYS[1]) - running, 0), running, math.max(now_ms - oldest_ms, 0)}
