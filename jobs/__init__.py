"""What the front end and the workers share: specs, states, the store. No torch, no HTTP."""
