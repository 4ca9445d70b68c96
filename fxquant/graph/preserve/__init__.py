"""What a graph keeps of the user's model beside forward: attributes, methods, extra state."""
