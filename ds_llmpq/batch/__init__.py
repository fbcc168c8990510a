"""OpenAI batch files: rows in, prompts as token ids, results and error rows out."""
