-- A job as it is at one moment: its stream's top, and its state, flat. Read one by one, the job could end in between.
return { top_of(KEYS[1]), redis.call('HGETALL', KEYS[2]) }
