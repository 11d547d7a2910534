-- Begin an epoch of a job, unless it is over, another entry's, cancelled or poisoned. Repeatable.
-- KEYS: 1 events, 2 state. ARGV: 1 entry, 2 worker, 3 expected last id, 4 epoch, 5 now, 6 ttl,
--       7 deliveries, 8 maximum deliveries, 9 maximum attempts without progress, 10-12 type, payload
--       and error code of the opening event, 13 payload of the error CANCELLED, 14 of DEAD_LETTERED,
--       15 the last attempt's worker and time: a server that lost writes may have other events under the same ids.
require_rights({
  { 'EXISTS', KEYS[1] }, { 'XINFO', 'STREAM', KEYS[1] }, { 'XADD', KEYS[1], '*', '', '' }, { 'PEXPIRE', KEYS[1], 1 },
  { 'HGETALL', KEYS[2] }, { 'HSET', KEYS[2], '', '' }, { 'PEXPIRE', KEYS[2], 1 },
})
local entry, worker, expected, epoch, now = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local top, state = top_of(KEYS[1]), hash(KEYS[2])

if is_over(state) then return {'OVER', state.error or '', state.entry or ''} end
if state.entry and state.entry ~= entry then return {'DUPLICATE', '', state.entry} end
local repeated = state.worker == worker and state.taken_ms == now and state.base == expected
if repeated and top == epoch .. '-0' then return {'TAKEN'} end
local attempt = (state.worker or '') .. ' ' .. (state.taken_ms or '')
if top ~= expected or attempt ~= ARGV[15] or next_epoch(top, state) ~= tonumber(epoch) then return {'RETRY'} end

-- An attempt was barren if it published no new token and did not give the job back (which changes its state).
local tokens, barren = state.tokens or '0', tonumber(state.barren or 0)
if state.state == 'running' and tokens == state.tokens_before then barren = barren + 1 end

local kind, payload, code = ARGV[10], ARGV[11], ARGV[12]
if state.cancel then
  kind, payload, code = 'error', ARGV[13], 'CANCELLED'
elseif barren >= tonumber(ARGV[9]) or tonumber(ARGV[7]) > tonumber(ARGV[8]) then
  kind, payload, code = 'error', ARGV[14], 'DEAD_LETTERED'
end

redis.call('XADD', KEYS[1], epoch .. '-0', 'type', kind, 'p', payload)
redis.call('HSET', KEYS[2], 'state', code == '' and 'running' or kind, 'epoch', epoch, 'worker', worker, 'entry', entry,
  'base', expected, 'tokens', tokens, 'tokens_before', tokens, 'barren', barren, 'taken_ms', now, 'updated_ms', now)
if code ~= '' then redis.call('HSET', KEYS[2], 'error', code, 'ended_ms', now) end
push_expiry(ARGV[6])
return {code == '' and 'TAKEN' or 'CLOSED', code}
