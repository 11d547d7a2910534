-- Return the place of the first entry that contains a text among the waiting entries, from 1, and the number of
-- waiting entries; false if none of the first entries contains it, or if it is delivered.
-- KEYS: 1 queue. ARGV: 1 group, 2 text, 3 entries to search.
require_rights({ { 'XRANGE', KEYS[1], '-', '+' }, { 'XPENDING', KEYS[1], ARGV[1] }, { 'XLEN', KEYS[1] } })
local function pending(...)
  local reply = redis.pcall('XPENDING', KEYS[1], ARGV[1], ...)
  return reply.err and { 0 } or reply
end
for place, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', ARGV[3])) do
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'p' and string.find(entry[2][i + 1], ARGV[2], 1, true) then
      local delivered = pending()[1] > 0 and pending('-', entry[1], ARGV[3]) or {}
      if #delivered > 0 and delivered[#delivered][1] == entry[1] then return false end
      return { place - #delivered, redis.call('XLEN', KEYS[1]) - pending()[1] }
    end
  end
end
return false
