"""The model card's contract: its two schemas, and a body checked as Cloudflare's validator does."""
