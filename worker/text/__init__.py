"""The text room: from text to token ids before the engine, from ids to published text after it.

Knows nothing of jobs, models and devices. Start at tokenizer.py for the way in and at text_stream.py for the way out.
"""
