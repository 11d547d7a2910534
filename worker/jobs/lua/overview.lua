-- Return the state of a queue, read at the same time: server's time, length, last delivered id, number of pending
-- entries, number of running ones, pending entries, id of the first waiting entry, and the entries above a cursor (id,
-- payload). As in depth.lua, an entry that was not renewed for a lease waits.
-- KEYS: 1 queue. ARGV: 1 group, 2 lease in ms, 3 cursor or empty, 4 maximum number of entries and of pending entries,
-- 5 bytes of payloads after which no further entry is returned.
require_rights({
  { 'EXISTS', KEYS[1] }, { 'XINFO', 'STREAM', KEYS[1] }, { 'XPENDING', KEYS[1], ARGV[1] }, { 'XRANGE', KEYS[1], '-', '+' },
  { 'TIME' }, { 'XLEN', KEYS[1] },
})
local limit, budget = tonumber(ARGV[4]), tonumber(ARGV[5])
local function fields_of(flat)
  local fields = {}
  for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
  return fields
end
local delivered, count, pending, overdue = '0-0', 0, {}, {}
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, group in ipairs(fields_of(redis.call('XINFO', 'STREAM', KEYS[1], 'FULL', 'COUNT', 1)).groups) do
    local fields = fields_of(group)
    if fields.name == ARGV[1] then
      delivered, count = fields['last-delivered-id'], fields['pel-count']
      pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', limit)
      overdue = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[2], '-', '+', 10000)
    end
  end
end
local waiting
for _, entry in ipairs(overdue) do -- a deleted entry stays pending until a worker claims it
  waiting = waiting or redis.call('XRANGE', KEYS[1], entry[1], entry[1])[1]
end
waiting = waiting or redis.call('XRANGE', KEYS[1], '(' .. delivered, '+', 'COUNT', 1)[1]
local entries, cursor = {}, ARGV[3]
while cursor ~= '' and #entries < limit and budget > 0 do
  local page = redis.call('XRANGE', KEYS[1], '(' .. cursor, '+', 'COUNT', math.min(10, limit - #entries))
  for _, entry in ipairs(page) do
    local payload = fields_of(entry[2]).p or ''
    cursor, budget = entry[1], budget - #payload
    table.insert(entries, { entry[1], payload })
  end
  if #page == 0 then break end
end
return {
  redis.call('TIME'), redis.call('XLEN', KEYS[1]), delivered, count, count - #overdue, pending,
  waiting and waiting[1] or '', entries,
}
