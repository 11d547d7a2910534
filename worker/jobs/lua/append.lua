-- Write a batch of events, all or none, if the stream's top is the expected one; answers the top as it is then.
-- A batch that is there already is not written again, since the top has moved; no key that has expired comes back.
-- ARGV: 1 expected top, 2 epoch, 3 worker, 4 state, 5 tokens, 6 error code, 7 now, 8 ttl; then id, type, payload of each.
local owner = redis.call('HMGET', KEYS[2], 'epoch', 'worker')
if owner[1] == ARGV[2] and owner[2] ~= ARGV[3] then return '0-0' end -- the server lost our take; another has our epoch
local top = top_of(KEYS[1])
if top ~= ARGV[1] or top == '0-0' then return top end

for i = 9, #ARGV, 3 do
  top = redis.call('XADD', KEYS[1], ARGV[i], 'type', ARGV[i + 1], 'p', ARGV[i + 2])
end
local over = ARGV[4] == 'end' or ARGV[4] == 'error'
redis.call('HSET', KEYS[2], 'epoch', ARGV[2], 'worker', ARGV[3], 'state', ARGV[4], 'tokens', ARGV[5], 'updated_ms', ARGV[7])
if over then redis.call('HSET', KEYS[2], 'ended_ms', ARGV[7]) end
if ARGV[6] ~= '' then redis.call('HSET', KEYS[2], over and 'error' or 'last_error', ARGV[6]) end
push_expiry(ARGV[8])
return top
