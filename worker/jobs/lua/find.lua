-- Return the last id of a page of entries, false for the last page, and those that contain a text.
-- KEYS: 1 queue. ARGV: 1 text, 2 first id, 3 entries per page.
require_rights({ { 'XRANGE', KEYS[1], '-', '+' } })
local page, found = redis.call('XRANGE', KEYS[1], ARGV[2], '+', 'COUNT', ARGV[3]), {}
for _, entry in ipairs(page) do
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'p' and string.find(entry[2][i + 1], ARGV[1], 1, true) then table.insert(found, entry) end
  end
end
return { #page == tonumber(ARGV[3]) and page[#page][1], found }
