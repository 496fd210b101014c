// A gRPC server and a client that calls it without a pause. Both use plain grpc-go: round_robin and its transparent
// retries, without a retry policy.
//
//	grpc_go serve ADDR
//	grpc_go call WORKERS ADDR...
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

type server struct {
	grpc_testing.UnimplementedTestServiceServer
}

// Takes a moment, so that a restart finds calls in flight.
func (server) UnaryCall(_ context.Context, request *grpc_testing.SimpleRequest) (*grpc_testing.SimpleResponse, error) {
	if request.FillServerId {
		time.Sleep(20 * time.Millisecond)
	}
	return &grpc_testing.SimpleResponse{Payload: request.Payload}, nil
}

func serve(addr string) {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		log.Fatal(err)
	}
	serving := grpc.NewServer()
	grpc_testing.RegisterTestServiceServer(serving, server{})
	go func() {
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		<-stop
		serving.GracefulStop()
	}()
	fmt.Printf("listens on %s\n", listener.Addr())
	if err := serving.Serve(listener); err != nil {
		log.Fatal(err)
	}
}

func call(workers int, addrs []string) {
	balanced := manual.NewBuilderWithScheme("test")
	var state resolver.State
	for _, addr := range addrs {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: addr})
	}
	balanced.InitialState(state)
	connection, err := grpc.NewClient("test:///app.test",
		grpc.WithResolvers(balanced),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`))
	if err != nil {
		log.Fatal(err)
	}
	client := grpc_testing.NewTestServiceClient(connection)
	slow := os.Getenv("SLOW") != ""
	request := &grpc_testing.SimpleRequest{FillServerId: slow, Payload: &grpc_testing.Payload{Body: make([]byte, 100)}}
	var calls, failed atomic.Int64
	var over atomic.Bool
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for !over.Load() {
				within, done := context.WithTimeout(context.Background(), 10*time.Second)
				_, err := client.UnaryCall(within, request)
				done()
				calls.Add(1)
				if err != nil {
					failed.Add(1)
					fmt.Printf("failed: %v\n", err)
				}
			}
		})
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	fmt.Println("calling")
	<-stop
	over.Store(true)
	all.Wait()
	fmt.Printf("calls %d failed %d\n", calls.Load(), failed.Load())
}

func main() {
	switch os.Args[1] {
	case "serve":
		serve(os.Args[2])
	case "call":
		workers, err := strconv.Atoi(os.Args[2])
		if err != nil {
			log.Fatal(err)
		}
		call(workers, os.Args[3:])
	}
}
