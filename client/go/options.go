package lowbit

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// Version is the version of this SDK; the user agent names it.
const Version = "0.1.0"

var tokenSyntax = regexp.MustCompile(`^[A-Za-z0-9._~+/-]+=*$`) // RFC 6750, section 2.1

// Option changes one option of a client.
type Option func(*options)

type options struct {
	settings
	tls         *TLS
	token       *string
	traceparent func(context.Context) string
}

// TLS says how a connection is secured. All certificates and keys are PEM.
type TLS struct {
	// CA holds the certificates that are trusted; empty takes the system's.
	CA []byte
	// Certificate and Key are what the client shows of itself (mutual TLS); both or none.
	Certificate, Key []byte
	// ServerName is the name to check instead of the address's; empty takes the address's.
	ServerName string
}

// WithKeepalive sets the time between two pings (default 30 s, gRPC's least is 10 s) and the
// time after which a connection without an answer is given up (default 10 s).
func WithKeepalive(interval, timeout time.Duration) Option {
	return func(o *options) { o.keepaliveInterval, o.keepaliveTimeout = interval, timeout }
}

// WithBackoff sets the wait before the second try, which doubles each time, and its bound.
// Default 100 ms and 2 s.
func WithBackoff(first, max time.Duration) Option {
	return func(o *options) { o.firstBackoff, o.maxBackoff = first, max }
}

// WithTLS secures the connection.
func WithTLS(t TLS) Option { return func(o *options) { o.tls = &t } }

// WithToken sends a bearer token with each call. Without TLS it is only sent to loopback.
func WithToken(token string) Option { return func(o *options) { o.token = &token } }

// WithTraceparent asks f, for each try, for a W3C traceparent to send; empty sends none.
func WithTraceparent(f func(context.Context) string) Option {
	return func(o *options) { o.traceparent = f }
}

func newOptions(address string, changes []Option) (*options, error) {
	o := &options{settings: defaults()}
	for _, change := range changes {
		change(o)
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	if o.token != nil && !tokenSyntax.MatchString(*o.token) {
		return nil, errors.New("lowbit: token has other characters than RFC 6750 allows, or none")
	}
	if o.token != nil && o.tls == nil && !isLoopback(address) {
		return nil, errors.New("lowbit: token without tls is only sent to loopback")
	}
	return o, nil
}

func (o *options) connect(address string) (*grpc.ClientConn, error) {
	secured, err := o.tls.credentials()
	if err != nil {
		return nil, err
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(secured),
		grpc.WithUserAgent("lowbit-go/" + Version),
		grpc.WithDisableRetry(), // gRPC's own would hide tries from the budget
		grpc.WithDisableServiceConfig(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: o.keepaliveInterval, Timeout: o.keepaliveTimeout, PermitWithoutStream: true,
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: o.firstBackoff, Multiplier: 2, MaxDelay: o.maxBackoff},
			MinConnectTimeout: 20 * time.Second, // gRPC's default; 0 would be none
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(o.maxMessageBytes), grpc.MaxCallSendMsgSize(o.maxMessageBytes)),
	}
	if isLoopback(address) { // a proxy of the environment cannot reach this machine's loopback
		dial = append(dial, grpc.WithNoProxy())
	}
	return grpc.NewClient(address, dial...)
}

// credentials returns how connections are made; those without TLS are in the clear.
func (t *TLS) credentials() (credentials.TransportCredentials, error) {
	if t == nil {
		return insecure.NewCredentials(), nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.ServerName}
	if len(t.CA) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(t.CA) {
			return nil, errors.New("lowbit: tls.ca holds no PEM certificate")
		}
	}
	if len(t.Certificate)+len(t.Key) > 0 {
		pair, err := tls.X509KeyPair(t.Certificate, t.Key)
		if err != nil {
			return nil, fmt.Errorf("lowbit: tls.certificate and tls.key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(config), nil
}

func isLoopback(address string) bool {
	if strings.HasPrefix(address, "unix:") {
		return true
	}
	host, _, _ := net.SplitHostPort(address)
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
