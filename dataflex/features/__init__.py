"""Features of rows under the current model: gradients and embeddings, in a store or direct."""
