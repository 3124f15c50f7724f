"""Many engines behind one address: who is there, who gets a request, and what happens when one dies."""
