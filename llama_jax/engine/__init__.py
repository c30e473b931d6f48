"""What runs on the host: requests, the queue, slots, and the text that comes of them."""
